"""One file for each word that `optim.name` takes."""
