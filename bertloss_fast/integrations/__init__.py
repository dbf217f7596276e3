"""The losses in the dress that training libraries expect; each module needs its library."""
