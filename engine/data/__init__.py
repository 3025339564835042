"""Manifests, pixels, loaders and phantom radiographs."""
