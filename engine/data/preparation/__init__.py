"""From official files to manifests: what all data sets share."""
