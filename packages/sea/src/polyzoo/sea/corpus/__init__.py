"""Mining of documented functions from packages, to train and evaluate on."""
