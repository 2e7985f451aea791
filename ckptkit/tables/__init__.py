"""The language of the family tables: rows, layouts, spellings, and the description of a model."""
