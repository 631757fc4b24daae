"""Language models: their folders, loading, hook points, and the sample model."""
