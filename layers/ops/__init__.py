"""The operators under the dynamic layers: a plain reference for each, fast versions beside it, and the dispatcher."""
