"""Written by `make proto` from `../proto`: do not edit."""
