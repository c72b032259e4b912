"""A CT in, its segmentation out; one or a folder of them."""
