"""The operators of the dynamic layers: a plain reference for each, faster versions, and the dispatcher."""
