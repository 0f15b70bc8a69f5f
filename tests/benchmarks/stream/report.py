def write_report(plan, table, results):
    return {"valid": None}
