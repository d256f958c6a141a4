"""Networks: layers, one file per family, and the registry that builds them."""
