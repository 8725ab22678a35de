"""Dynamic layers put in the places of convolutions, checked, and taken out again."""
