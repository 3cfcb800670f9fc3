"""PyTorch side: masked layers, models, local training, data, figures and the demo."""
