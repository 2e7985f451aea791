"""Pure arithmetic on a parallel grid."""
