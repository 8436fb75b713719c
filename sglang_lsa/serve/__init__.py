"""What a server tells and is told: status, metrics, control, one request, the live view, the screen of requests."""
