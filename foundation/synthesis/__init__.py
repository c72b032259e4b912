"""Label maps rendered as CTs: anatomies, deformation, lesions, the scanner."""
