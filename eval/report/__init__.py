"""Tables, pictures and the page. It asks no model and no judge."""
