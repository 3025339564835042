"""PsPG training engine: models, data, training and evaluation."""
