"""What an evaluation leaves behind for people: tables, pictures, pages and comparisons."""
