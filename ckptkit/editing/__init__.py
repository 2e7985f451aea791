"""Models made of models: averages, other layers, other vocabularies, merges. All of it is planned, none needs torch."""
