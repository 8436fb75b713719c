"""What a request goes through, in its order: observe, score, select, plan, recall, remap."""
