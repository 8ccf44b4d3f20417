"""What a band is worth, measured on real text: what is scored, who reads it, and searches and evaluations by that."""
