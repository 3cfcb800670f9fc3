"""What runs on a device: engines, its state, the client, the agent and the compactor. No torch, no server."""
