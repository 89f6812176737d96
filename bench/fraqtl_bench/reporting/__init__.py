"""What every report of a run needs: notes to resume from, files written whole, tables, figures, a page."""
