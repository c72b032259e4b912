"""Fine-tuning: new classes by a prompt and a few scans, and what that made the model forget."""
