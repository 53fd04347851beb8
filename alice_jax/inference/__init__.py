"""From a trained network to labels of whole scans: `sliding` windows, then `original`, the geometry of the file."""
