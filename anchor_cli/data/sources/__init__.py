"""Files and Hub data sets of pairs, read piece by piece."""
