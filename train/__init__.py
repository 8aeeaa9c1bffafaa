"""Training scripts: `python -m train.<name>`. What they share is `train.loop`."""
