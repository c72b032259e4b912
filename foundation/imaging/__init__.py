"""A CT and its segmentation: files, frames, results, pictures."""
