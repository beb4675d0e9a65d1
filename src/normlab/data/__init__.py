"""Data sets: what is there (`inventory`, without torch) and the batches made of it (`load`)."""
