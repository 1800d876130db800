"""The application's packages, of Python and Node.js: installed versions, vulnerabilities, newer versions."""
