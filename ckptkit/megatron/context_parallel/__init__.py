"""Context parallelism: sequences cut over ranks, whose attention sees the keys and values of all of them."""
