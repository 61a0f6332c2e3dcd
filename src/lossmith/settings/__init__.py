"""What a recipe is: its fields, what they take, and what is said of one that is wrong."""
