"""For operators: certificate tables, certificates and CRLs as the key service issues them."""
