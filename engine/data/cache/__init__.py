"""Cache of decoded, resized pixels."""
