"""The training core that pretraining and tuning share."""
