"""The host side: where pictures come from, how they are decoded, in which order they arrive."""
