"""gadcore inside programs and frameworks of others."""
