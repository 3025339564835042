"""From the official files of a data set, as downloaded, to the engine's manifests; one module a data set."""
