"""Device code and launchers. Nothing here allocates, and nothing here knows of autograd."""
