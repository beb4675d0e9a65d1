"""normlab: what does a normalisation layer actually buy?"""
