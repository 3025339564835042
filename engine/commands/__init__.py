"""The commands of `pspg-engine`."""
