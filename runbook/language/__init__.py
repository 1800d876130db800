"""A report's texts in the reader's language: catalogues of gettext (`ja/*.po`), and their application to a page."""
