"""One file per family of data sets: from files to samples."""
