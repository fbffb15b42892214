"""The model in PyTorch, written once: training, export and the torch backend use these modules and no others."""
