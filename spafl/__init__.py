"""spafl: federated training that exchanges only thresholds, and devices whose models physically shrink."""

__version__ = "0.1.0"
