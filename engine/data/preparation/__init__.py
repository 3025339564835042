"""Official files made into manifests: what all data sets share."""
