"""CLIP backbone, prompt decoder, spatial fusion and their assembly."""
