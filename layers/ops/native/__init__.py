"""CPU operators in C, compiled by the system's compiler on first use."""
