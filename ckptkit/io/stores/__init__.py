"""Object stores: addresses, reading by ranges, writing by multipart uploads.

Nothing outside this room imports `obstore` or `botocore`, and nothing in it does so before a store is named.
"""
