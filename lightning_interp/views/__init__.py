"""Everything that people see: samples, maps, pictures and the HTML report."""
