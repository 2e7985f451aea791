"""The level trainability: does a checkpoint learn on its grid?"""
