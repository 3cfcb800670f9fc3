"""The aggregation server: rounds, thresholds, devices and bundles over HTTP. It never sees a weight."""
